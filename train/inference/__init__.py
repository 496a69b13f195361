"""Running a trained model: weights into a decoder, key-value cache, sampling, text out of ids."""
