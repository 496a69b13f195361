"""From `longhaul submit` to the finished model: rendering jobs, deciding after each attempt, checking nodes, watching runs."""
