"""Run folders -> numbers, figures and sentences. Imports no torch."""
