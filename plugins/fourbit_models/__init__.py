"""What fourbit's plugins answer to core's questions about models: which tensors one has, and how it is saved.

Apart from the plugins themselves, which register with their library when they are imported: a module of this package
imports its library only if it is asked about a model that may be of it.
"""
