-- Deliveries that wait for nothing but room at their endpoint. They come back at a pace, and sooner when there is room.
ALTER TABLE delivery_states ADD COLUMN paced boolean NOT NULL DEFAULT false;
CREATE INDEX delivery_states_paced ON delivery_states (connection_id, due_at) WHERE state = 'waiting' AND paced;
