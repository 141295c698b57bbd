"""Tools for before and after training. They import the core; the core imports them only inside command lines."""
