"""What a rank does from its configuration to its end; each stage is an assembly of parts."""
