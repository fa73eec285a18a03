"""Prune step by step: sessions, schedules, one shot, sensitivity."""
