"""The frozen configuration: one dataclass per concern, one line per field. No torch here."""
