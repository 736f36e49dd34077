"""Commands of `quire` that have a module of their own: each adds its subcommands with ``add(commands)``."""
