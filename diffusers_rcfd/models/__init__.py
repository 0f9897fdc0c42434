"""Networks: U-Nets, classifiers, and what is loaded into them."""
