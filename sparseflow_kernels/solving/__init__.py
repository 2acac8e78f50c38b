"""One solve, from the caller's arguments to whoever runs it; `odeint` is the door."""
