"""Results for people: tables of a plan, sheets of images."""
