//! Webhook signatures by the Standard Webhooks specification, version 1.0.0, scheme `v1`:
//! HMAC-SHA256 over `{webhook-id}.{webhook-timestamp}.{body}`.

use std::fmt;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, HeaderName, HeaderValue};
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretSlice};
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Names the message; the same for all attempts, so that a receiver can drop repeats.
pub const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
/// The time of this attempt, in whole seconds since the Unix epoch.
pub const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
/// The signatures, separated by spaces, each with its scheme: `v1,` and Base64.
pub const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// What a signing secret starts with ("Symmetric" keys of the specification).
const SECRET_PREFIX: &str = "whsec_";
/// How many random bytes a secret may have, by the specification.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// How many random bytes [`SigningSecret::generate`] makes: the output size of SHA-256, beyond which
/// a longer HMAC key adds little (RFC 2104 §3).
const GENERATED_BYTES: usize = 32;
/// More signatures than any rotation has; what follows is not looked at.
const MAX_SIGNATURES: usize = 16;

/// Base64 as people paste it: with or without padding.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A symmetric signing secret, `whsec_` and the Base64 of 24 to 64 bytes.
///
/// It shows itself in no log (`Debug` is redacted, and it does not serialize) and compares in
/// constant time.
#[derive(Clone)]
pub struct SigningSecret {
    key: SecretSlice<u8>,
    /// HMAC after the key's block, so that a signature does not hash the key again.
    keyed: Hmac<Sha256>,
}

/// Why a text is no signing secret. It never repeats the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The prefix is missing.
    #[error("a signing secret starts with `whsec_`")]
    Prefix,
    /// What follows the prefix is not Base64.
    #[error("a signing secret is `whsec_` followed by standard Base64")]
    Base64,
    /// Too short to be safe, or longer than the specification allows.
    #[error("a signing secret has 24 to 64 bytes before Base64, this one has {0}")]
    Length(usize),
}

impl SigningSecret {
    /// Reads a secret in its written form.
    ///
    /// # Errors
    /// If the prefix, the Base64 or the length is not as the specification says.
    pub fn parse(text: &str) -> Result<Self, SecretError> {
        let encoded = text.strip_prefix(SECRET_PREFIX).ok_or(SecretError::Prefix)?;
        let key: SecretSlice<u8> = LENIENT.decode(encoded).map_err(|_| SecretError::Base64)?.into();
        let length = key.expose_secret().len();
        if !SECRET_BYTES.contains(&length) {
            return Err(SecretError::Length(length));
        }
        Ok(Self::from_key(key))
    }

    /// A new secret of 32 bytes from `rng`.
    pub fn generate(rng: &mut impl rand::CryptoRng) -> Self {
        let mut key = vec![0; GENERATED_BYTES];
        rng.fill_bytes(&mut key);
        Self::from_key(key.into())
    }

    fn from_key(key: SecretSlice<u8>) -> Self {
        let keyed =
            Hmac::new_from_slice(key.expose_secret()).expect("HMAC takes a key of any length (RFC 2104 §2)");
        Self { key, keyed }
    }

    /// The written form, to show to its owner once or to store encrypted.
    pub fn expose(&self) -> String {
        format!("{SECRET_PREFIX}{}", LENIENT.encode(self.key.expose_secret()))
    }

    fn hmac(&self, id: &str, timestamp: i64, body: &[u8]) -> Hmac<Sha256> {
        let mut hmac = self.keyed.clone();
        hmac.update(id.as_bytes());
        hmac.update(format!(".{timestamp}.").as_bytes());
        hmac.update(body);
        hmac
    }
}

impl PartialEq for SigningSecret {
    fn eq(&self, other: &Self) -> bool {
        self.key.expose_secret().ct_eq(other.key.expose_secret()).into()
    }
}

impl Eq for SigningSecret {}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningSecret([REDACTED])")
    }
}

/// The value of `webhook-signature` for one attempt: a signature by each of `secrets`, in their
/// order, so that a receiver can verify with either secret while one is being replaced.
///
/// `body` is signed byte by byte as it will be sent. `timestamp` is the attempt's time in whole
/// seconds since the Unix epoch, the value of `webhook-timestamp`. The specification wants no `.` in
/// `id`, which would make the signed content ambiguous; delivery ids have none.
pub fn sign<'s>(
    secrets: impl IntoIterator<Item = &'s SigningSecret>,
    id: &str,
    timestamp: i64,
    body: &[u8],
) -> HeaderValue {
    let mut value = String::with_capacity(48);
    for secret in secrets {
        if !value.is_empty() {
            value.push(' ');
        }
        value.push_str("v1,");
        LENIENT.encode_string(secret.hmac(id, timestamp, body).finalize().into_bytes(), &mut value);
    }
    HeaderValue::try_from(value).expect("`v1,`, Base64 and spaces are visible ASCII")
}

/// Why a request is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// A header is absent, given twice, or not visible ASCII.
    #[error("the header `{0}` is missing or not readable")]
    Header(&'static str),
    /// The timestamp is not a number of seconds.
    #[error("the header `webhook-timestamp` is not a number of seconds")]
    Timestamp,
    /// The timestamp lies further from now than the tolerance: a replay, or clocks that disagree.
    #[error("the header `webhook-timestamp` is too far from the present")]
    Stale,
    /// No signature fits any of the secrets.
    #[error("no signature matches")]
    Mismatch,
}

/// Checks a received request: one of its `v1` signatures was made by one of `secrets`, over exactly
/// this body, at most `tolerance` before or after `now`. Other schemes are passed over.
///
/// # Errors
/// Says which check failed; a receiver answers all of them alike, with 4xx.
pub fn verify(
    secrets: &[SigningSecret],
    headers: &HeaderMap,
    body: &[u8],
    now: Timestamp,
    tolerance: SignedDuration,
) -> Result<(), VerifyError> {
    let id = single(headers, "webhook-id")?;
    let timestamp: i64 = single(headers, "webhook-timestamp")?.parse().map_err(|_| VerifyError::Timestamp)?;
    let sent = Timestamp::from_second(timestamp).map_err(|_| VerifyError::Timestamp)?;
    if now.duration_since(sent).abs() > tolerance {
        return Err(VerifyError::Stale);
    }
    for signature in single(headers, "webhook-signature")?.split(' ').take(MAX_SIGNATURES) {
        let Some(encoded) = signature.strip_prefix("v1,") else { continue };
        let Ok(signature) = LENIENT.decode(encoded) else { continue };
        for secret in secrets {
            // `verify_slice` compares in constant time.
            if secret.hmac(id, timestamp, body).verify_slice(&signature).is_ok() {
                return Ok(());
            }
        }
    }
    Err(VerifyError::Mismatch)
}

fn single<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a str, VerifyError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().map_err(|_| VerifyError::Header(name)),
        _ => Err(VerifyError::Header(name)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use rand::SeedableRng;

    use super::*;

    const BODY: &[u8] = br#"{"event_type":"ping","data":{"success":true}}"#;
    const ID: &str = "msg_loFOjxBNrRLzqYUf";
    const AT: i64 = 1_731_705_121;
    const SIGNATURE: &str = "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0=";

    /// The secret of the test vector. It has 18 bytes, which `parse` refuses as too short.
    fn secret() -> SigningSecret {
        SigningSecret::from_key(LENIENT.decode("plJ3nmyCDGBKInavdOK15jsl").unwrap().into())
    }

    fn another() -> SigningSecret {
        SigningSecret::generate(&mut rand::rngs::StdRng::seed_from_u64(7))
    }

    fn request(signature: &HeaderValue) -> HeaderMap {
        HeaderMap::from_iter([
            (WEBHOOK_ID, HeaderValue::from_static(ID)),
            (WEBHOOK_TIMESTAMP, HeaderValue::from(AT)),
            (WEBHOOK_SIGNATURE, signature.clone()),
        ])
    }

    fn check(
        secrets: &[SigningSecret],
        headers: &HeaderMap,
        body: &[u8],
        now: i64,
    ) -> Result<(), VerifyError> {
        verify(secrets, headers, body, Timestamp::from_second(now).unwrap(), SignedDuration::from_mins(5))
    }

    /// The vector of the Svix documentation ("Verifying webhooks manually").
    #[test]
    fn the_published_test_vector() {
        let signature = sign(&[secret()], ID, AT, BODY);
        assert_eq!(signature, SIGNATURE);
        assert_eq!(check(&[secret()], &request(&signature), BODY, AT), Ok(()));
    }

    #[test]
    fn each_secret_signs_while_one_is_replaced() {
        let both = sign(&[another(), secret()], ID, AT, BODY);
        assert_eq!(both.to_str().unwrap().split(' ').nth(1), Some(SIGNATURE));
        for receiver in [secret(), another()] {
            assert_eq!(check(&[receiver], &request(&both), BODY, AT), Ok(()));
        }
        assert_eq!(sign(&[], ID, AT, BODY), "");
    }

    #[test]
    fn what_was_tampered_with_is_refused() {
        let good = request(&sign(&[secret()], ID, AT, BODY));
        assert_eq!(check(&[another()], &good, BODY, AT), Err(VerifyError::Mismatch));
        assert_eq!(check(&[secret()], &good, b"{}", AT), Err(VerifyError::Mismatch));
        assert_eq!(check(&[secret()], &good, BODY, AT + 300), Ok(()));
        assert_eq!(check(&[secret()], &good, BODY, AT + 301), Err(VerifyError::Stale));
        assert_eq!(check(&[secret()], &good, BODY, AT - 301), Err(VerifyError::Stale));
        for (name, value, error) in [
            (WEBHOOK_ID, "msg_other", VerifyError::Mismatch),
            (WEBHOOK_TIMESTAMP, "1731705122", VerifyError::Mismatch),
            (WEBHOOK_TIMESTAMP, "soon", VerifyError::Timestamp),
            (WEBHOOK_TIMESTAMP, "9223372036854775807", VerifyError::Timestamp),
            (WEBHOOK_SIGNATURE, "v1a,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0=", VerifyError::Mismatch),
            (WEBHOOK_SIGNATURE, "v1,", VerifyError::Mismatch),
            (WEBHOOK_SIGNATURE, "v1,rAvf", VerifyError::Mismatch),
        ] {
            let mut headers = good.clone();
            headers.insert(&name, HeaderValue::from_static(value));
            assert_eq!(check(&[secret()], &headers, BODY, AT), Err(error), "{name}: {value}");
        }
        let mut twice = good.clone();
        twice.append(WEBHOOK_ID, HeaderValue::from_static(ID));
        assert_eq!(check(&[secret()], &twice, BODY, AT), Err(VerifyError::Header("webhook-id")));
        let mut unsigned = good;
        unsigned.remove(WEBHOOK_SIGNATURE);
        assert_eq!(check(&[secret()], &unsigned, BODY, AT), Err(VerifyError::Header("webhook-signature")));
    }

    #[test]
    fn secrets_read_back_as_written_and_show_nothing() {
        let made = another();
        assert_eq!(SigningSecret::parse(&made.expose()), Ok(made.clone()));
        assert_ne!(made, secret());
        assert_eq!(format!("{made:?}"), "SigningSecret([REDACTED])");
        // Without padding, as some tools show it.
        assert_eq!(SigningSecret::parse(made.expose().trim_end_matches('=')), Ok(made));
        let encoded = |bytes: usize| format!("whsec_{}", LENIENT.encode(vec![1; bytes]));
        for (text, error) in [
            ("plJ3nmyCDGBKInavdOK15jsl".to_owned(), SecretError::Prefix),
            ("whsk_plJ3nmyCDGBKInavdOK15jsl".to_owned(), SecretError::Prefix),
            ("whsec_not base64".to_owned(), SecretError::Base64),
            ("whsec_plJ3nmyCDGBKInavdOK15jsl".to_owned(), SecretError::Length(18)),
            (encoded(23), SecretError::Length(23)),
            (encoded(65), SecretError::Length(65)),
        ] {
            assert_eq!(SigningSecret::parse(&text), Err(error));
        }
        assert!(SigningSecret::parse(&encoded(24)).is_ok() && SigningSecret::parse(&encoded(64)).is_ok());
    }
}
