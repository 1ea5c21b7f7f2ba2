"""Data sets to data files: one format (`lines`), readers of the published sets, and the steps between them.

Import from the modules; nothing here loads torch.
"""
