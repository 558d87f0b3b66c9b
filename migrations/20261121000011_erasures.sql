-- Erasures: jobs that empty the payloads of an organization, or of one of its events, wherever the bus keeps them. What
-- happened stays. The archiver works them off; each step may be repeated.
CREATE TABLE erasures (
    id              uuid PRIMARY KEY,
    organization_id uuid NOT NULL REFERENCES organizations (id),
    -- None: all of the organization's events that had arrived by requested_at.
    event_uid       uuid,
    state           text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done')),
    -- How many events waited for their time when it was asked for; those are left.
    waiting         bigint NOT NULL,
    -- What was emptied: events, kept answers of subscribers, messages of dead letters, rows in cold storage.
    events          bigint NOT NULL DEFAULT 0,
    answers         bigint NOT NULL DEFAULT 0,
    dead_letters    bigint NOT NULL DEFAULT 0,
    archived        bigint NOT NULL DEFAULT 0,
    requested_at    timestamptz NOT NULL DEFAULT now(),
    -- When the archiver took it last.
    tried_at        timestamptz,
    finished_at     timestamptz,
    CHECK ((state = 'done') = (finished_at IS NOT NULL))
);
CREATE INDEX erasures_page ON erasures (organization_id, id);
CREATE INDEX erasures_open ON erasures (id) WHERE state <> 'done';
-- One job for an event at a time.
CREATE UNIQUE INDEX erasures_event ON erasures (organization_id, event_uid)
    WHERE state <> 'done' AND event_uid IS NOT NULL;
