"""The commands, by what people want: to look, to change, to keep a store, to set crewlog up."""
