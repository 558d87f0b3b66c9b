-- The brokers that publishers have met: a run of a server, with a delivery stream. One that was not met before may lack
-- what its predecessor had, so what lies in between is compared with history once.
CREATE TABLE brokers (
    -- The server's own id, a new one for each start.
    server        text NOT NULL,
    -- When the delivery stream was created: tells it from one of the same name.
    stream        text NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    seen_at       timestamptz NOT NULL DEFAULT now(),
    -- Whoever compares holds the row until this time.
    lease_until   timestamptz NOT NULL DEFAULT '-infinity',
    reconciled_at timestamptz,
    PRIMARY KEY (server, stream)
);
