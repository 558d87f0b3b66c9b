-- What an organization has of its own: a lane of the delivery queue, and limits of what it may publish. Whoever does not know
-- these columns runs on as before.

ALTER TABLE organizations
    -- The lane of its deliveries; NULL for the one that its id falls on. A change counts up the version (invariant I2).
    ADD COLUMN lane smallint CHECK (lane BETWEEN 0 AND 255),
    -- Events in a second, and at once; 0 for no limit, NULL for what is configured.
    ADD COLUMN publish_rate double precision CHECK (publish_rate >= 0 AND publish_rate <= 1e9),
    ADD COLUMN publish_burst bigint CHECK (publish_burst >= 0),
    -- Events in a calendar day or month (UTC); 0 for no limit, NULL for what is configured.
    ADD COLUMN publish_quota bigint CHECK (publish_quota >= 0),
    ADD COLUMN publish_quota_period text CHECK (publish_quota_period IN ('day', 'month')),
    ADD CHECK ((publish_rate IS NULL) = (publish_burst IS NULL)),
    ADD CHECK ((publish_quota IS NULL) = (publish_quota_period IS NULL));

-- Few have one, and workers ask for those.
CREATE INDEX organizations_lane ON organizations (lane) WHERE lane IS NOT NULL;

-- How many events each organization has published, by the day (UTC) on which they were counted. Publishers add what they have
-- counted about once a second.
CREATE TABLE organization_usage (
    organization_id uuid NOT NULL REFERENCES organizations (id),
    day             date NOT NULL,
    events          bigint NOT NULL,
    PRIMARY KEY (organization_id, day)
);
