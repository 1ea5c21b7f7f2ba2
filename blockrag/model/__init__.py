"""The model room: the only place that knows transformers modeling. `BlockModel` is its door."""
