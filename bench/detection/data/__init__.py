"""What the tables read: sets from a folder, photographs, attacks and corruptions of them."""
