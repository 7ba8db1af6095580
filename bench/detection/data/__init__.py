"""The data of the tables: sets from a folder, photographs, texts and files, and attacks and corruptions."""
