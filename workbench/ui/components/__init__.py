"""Parts of pages: each module has `show(...)`, which renders and returns a value. No state but what is passed in."""
