"""How calls are made: signed, encrypted, traced, tried again where that is safe, and not made at all to a dead peer."""
