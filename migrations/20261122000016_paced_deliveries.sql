-- Deliveries that wait for nothing but room at their endpoint. They come back at a pace, and sooner when there is room. The
-- turn in which that is so, and not a flag: whoever has them wait for something else raises the turn.
ALTER TABLE delivery_states ADD COLUMN paced_turn bigint;
CREATE INDEX delivery_states_paced ON delivery_states (connection_id, due_at)
    WHERE state = 'waiting' AND paced_turn = turn;
