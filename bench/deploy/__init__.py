"""What is deployed: exported files, the server, scoring of folders, drift."""
