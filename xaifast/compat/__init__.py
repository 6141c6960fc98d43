"""Drop-in replacements: other packages' interfaces on xaifast's engine; only the import line changes."""
