"""Adapters for the engines that serve them: their rules, exports, and the proof of an export."""
