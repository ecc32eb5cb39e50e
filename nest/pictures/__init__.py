"""Pictures of what was found and measured, drawn with matplotlib."""
