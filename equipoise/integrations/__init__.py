"""Adapters to other frameworks, one module each; a module imports its framework, and says which extra installs it."""
