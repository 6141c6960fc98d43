"""The operators in plain torch and NumPy: the executable specification."""
