"""Next-item models; every file imports siblings only, so that the folder travels as remote code."""
