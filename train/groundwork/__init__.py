"""What is looked into before the ranks of a run start: its data, its first weights. One module a kind of run; torch-free."""
