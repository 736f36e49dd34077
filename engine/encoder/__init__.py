"""Encoders: models that read a whole text at once and embed it, or rate a pair of texts; they generate nothing"""
