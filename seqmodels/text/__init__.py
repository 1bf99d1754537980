"""Text in and out of a language model: tokenizers, chat templates, sampling, text streams."""
