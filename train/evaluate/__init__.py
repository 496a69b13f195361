"""What an evaluation does with a model: measures texts, labels rows, writes outputs; and keeps what came of it."""
