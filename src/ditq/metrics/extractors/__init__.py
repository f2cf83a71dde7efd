"""Networks that metrics look through."""
