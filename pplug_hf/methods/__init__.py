"""Methods: ways to answer a user's question with one frozen language model."""
