"""Fleet: several instances and endpoints as one: how each is, and which of them gets the next request of a public name."""
