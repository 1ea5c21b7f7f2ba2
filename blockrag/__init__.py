"""blockrag: retrieval-augmented generation that does not prefill the same passages twice."""

__version__ = "0.1.0"
