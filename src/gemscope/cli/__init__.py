"""Floor 6: one thin command per verb: parse, call one library function, print."""
