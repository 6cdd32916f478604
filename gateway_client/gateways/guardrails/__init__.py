"""What may not be in a question to a model or in its answer: patterns, rules, and the look-back over a stream. Pure."""
