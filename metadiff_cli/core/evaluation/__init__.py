"""Episodes, accuracy with intervals, controls, diagnostics."""
