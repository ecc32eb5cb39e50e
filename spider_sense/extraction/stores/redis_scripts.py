"""The changes of the store in Redis, each a script in Lua that the server runs as one step."""

__all__ = ["CLEAR", "ERASE", "GROUPS", "LINK", "SET"]

SET = """
local written = {}
for i = 3, #KEYS do
  local at = 5 * (i - 3) + 2
  local name, old, new, standing, state = unpack(ARGV, at, at + 4)
  local tag = redis.call('HGET', KEYS[i], 'tag') or ''
  written[i - 2] = (tag == old or tag == new) and 1 or 0
  if tag == old then
    redis.call('HSET', KEYS[i], 'tag', new, 'state', state, 'standing', standing)
    redis.call('ZADD', KEYS[1], 'GT', ARGV[1], name)
    if standing == '' then redis.call('HDEL', KEYS[2], name) else redis.call('HSET', KEYS[2], name, standing) end
  end
end
return written
"""
"""KEYS: seen, own, and the states. ARGV: the time; for each state its principal, the tag that was read, a new one, the
standing and the state. Returns 1 for each that was written, by this command or by the same one before."""

ERASE = """
local erased = 0
for i = 5, #KEYS do
  local name = ARGV[i - 3]
  local seen = redis.call('ZSCORE', KEYS[1], name)
  if ARGV[1] == '' or (seen and tonumber(seen) < tonumber(ARGV[1])) then
    erased = erased + redis.call('DEL', KEYS[i])
    redis.call('ZREM', KEYS[1], name)
    for k = 2, 4 do redis.call('HDEL', KEYS[k], name) end
  end
end
return erased
"""
"""KEYS: seen, own, group, party, and the states. ARGV: the time before which they were seen, or nothing; principals."""

CLEAR = """
local cleared = 0
for i = 3, #KEYS do
  local own, group = redis.call('HDEL', KEYS[1], ARGV[i - 1]), redis.call('HDEL', KEYS[2], ARGV[i - 1])
  if own == 1 then redis.call('HSET', KEYS[i], 'standing', '', 'tag', ARGV[1]) end
  if own + group > 0 then cleared = cleared + 1 end
end
return cleared
"""
"""KEYS: own, group, and the states. ARGV: a new tag, so that no writer brings a standing back; principals."""

GROUPS = """
redis.call('DEL', KEYS[1])
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('HSET', KEYS[1], ARGV[2 * i - 3], ARGV[2 * i - 2]) end
end
"""
"""KEYS: group, and the states. ARGV: for each state its principal and the standing."""

LINK = """
local old, name = {}, nil
for i = 2, #ARGV do
  local party = redis.call('HGET', KEYS[1], ARGV[i])
  if party then
    old[party] = true
    if not name or party < name then name = party end
  end
end
name = name or ARGV[1]
for i = 2, #ARGV do redis.call('HSET', KEYS[1], ARGV[i], name) end
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if old[all[i + 1]] then redis.call('HSET', KEYS[1], all[i], name) end
end
"""
"""KEYS: party. ARGV: the name of the link if none of them is in one, principals."""
