"""The same registry for asyncio: nothing here blocks the loop."""
