"""People in the loop: pairs drawn for raters, their answers as human labels, and what those say of the annotations."""
