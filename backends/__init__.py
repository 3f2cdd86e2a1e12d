"""Built-in backends, one folder each; README.md beside this file says how to add one."""
