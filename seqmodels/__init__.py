"""Linear-time sequence models in Flax: mixers, blocks, language models and their sharding."""
