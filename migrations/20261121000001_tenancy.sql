-- Organizations, API keys, connections and subscriptions.
--
-- organizations.version is the linearization point of matching (invariant I2): every change of a
-- connection or subscription increments it in its own transaction, and every publish transaction
-- reads it. A publisher whose cached snapshot carries another version reloads before it matches.

CREATE TABLE organizations (
    id         uuid PRIMARY KEY,
    name       text NOT NULL UNIQUE CHECK (char_length(name) BETWEEN 1 AND 200),
    version    bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE connections (
    id                    uuid PRIMARY KEY,
    organization_id       uuid NOT NULL REFERENCES organizations (id),
    name                  text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 200),
    kind                  text NOT NULL CHECK (kind IN ('webhook', 'publisher')),
    -- Counts the changes of this row. It travels with each delivery, so that a worker whose cached
    -- copy is older reloads it.
    version               bigint NOT NULL DEFAULT 1,
    enabled               boolean NOT NULL DEFAULT true,
    disabled_reason       text,
    url                   text,
    headers               jsonb NOT NULL DEFAULT '{}',
    timeout_ms            integer NOT NULL DEFAULT 15000 CHECK (timeout_ms BETWEEN 1000 AND 30000),
    content_mode          text NOT NULL DEFAULT 'structured' CHECK (content_mode IN ('structured', 'binary')),
    secret                text,
    -- The secret before the last change still signs until this time, so that a subscriber can rotate.
    previous_secret       text,
    previous_secret_until timestamptz,
    created_at            timestamptz NOT NULL DEFAULT now(),
    updated_at            timestamptz NOT NULL DEFAULT now(),
    deleted_at            timestamptz,
    CHECK (kind <> 'webhook' OR (url IS NOT NULL AND secret IS NOT NULL))
);
CREATE UNIQUE INDEX connections_name ON connections (organization_id, name) WHERE deleted_at IS NULL;
CREATE INDEX connections_page ON connections (organization_id, id) WHERE deleted_at IS NULL;

CREATE TABLE api_keys (
    id              uuid PRIMARY KEY,
    organization_id uuid NOT NULL REFERENCES organizations (id),
    name            text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 200),
    -- SHA-256 of the key. The key is 256 random bits, so a slow password hash would add nothing.
    hash            bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32),
    scopes          text[] NOT NULL CHECK (scopes <@ ARRAY['publish', 'subscribe', 'read', 'admin'] AND cardinality(scopes) > 0),
    connection_id   uuid REFERENCES connections (id),
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz,
    revoked_at      timestamptz
);
CREATE INDEX api_keys_page ON api_keys (organization_id, id);

CREATE TABLE subscriptions (
    id              uuid PRIMARY KEY,
    organization_id uuid NOT NULL REFERENCES organizations (id),
    connection_id   uuid NOT NULL REFERENCES connections (id),
    event_type      text NOT NULL CHECK (char_length(event_type) BETWEEN 1 AND 255),
    publisher       uuid REFERENCES connections (id),
    filter          text CHECK (char_length(filter) BETWEEN 1 AND 1024),
    -- SHA-256 of the filter, which itself may be longer than an index row may be.
    filter_hash     bytea,
    -- What the compiled filter takes in a publisher's memory, bytes. Their sum is limited.
    filter_bytes    integer NOT NULL DEFAULT 0,
    enabled         boolean NOT NULL DEFAULT true,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted_at      timestamptz,
    CHECK ((filter IS NULL) = (filter_hash IS NULL))
);
-- "Creating an identical one returns the existing": unique in the database, not by look-up.
CREATE UNIQUE INDEX subscriptions_identity
    ON subscriptions (connection_id, event_type, publisher, filter_hash) NULLS NOT DISTINCT
    WHERE deleted_at IS NULL;
CREATE INDEX subscriptions_page ON subscriptions (organization_id, id) WHERE deleted_at IS NULL;
CREATE INDEX subscriptions_publisher ON subscriptions (publisher) WHERE deleted_at IS NULL;
