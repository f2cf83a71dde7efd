"""Reports for people: tables of a plan, the HTML page, the model card, and sheets of images."""
