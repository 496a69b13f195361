"""Exchange with other formats: key maps with proof, the Hugging Face export."""
