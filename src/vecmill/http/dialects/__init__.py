"""One file for each wire dialect: a body into a request of the facade, its result into a body; nothing more."""
