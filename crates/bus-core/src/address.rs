//! Which network addresses a sink may reach: only public ones, unless configuration allows more.
//!
//! Subscribers name the URLs that the bus calls, so a URL must never become a way into the bus's own
//! network (server-side request forgery). [`AddressPolicy::check_url`] refuses early what can be seen in
//! the URL itself; it is a help to the user and no protection, since a name may resolve to anything
//! later. The protection is [`AddressPolicy::permits`], asked for each address when it is dialled.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use url::{Host, Url};

/// The longest URL that is accepted, characters.
pub const MAX_URL_LEN: usize = 2048;

/// A range of addresses that are not globally reachable, or that reach another address than they show.
struct SpecialRange {
    net: IpNet,
    purpose: &'static str,
}

const fn v4(octets: [u8; 4], prefix_len: u8, purpose: &'static str) -> SpecialRange {
    let [a, b, c, d] = octets;
    SpecialRange { net: IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), prefix_len), purpose }
}

const fn v6(start: [u16; 4], prefix_len: u8, purpose: &'static str) -> SpecialRange {
    let [a, b, c, d] = start;
    let address = Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0);
    SpecialRange { net: IpNet::new_assert(IpAddr::V6(address), prefix_len), purpose }
}

/// What is refused by default: the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890)
/// without their globally reachable entries, multicast, and all of IPv6 that is not global unicast.
/// Specific ranges stand before the ones that contain them, so that the reason given is the precise one.
///
/// Ranges that translate or tunnel to IPv4 are refused as a whole instead of judging the address inside:
/// whether a translator lets 64:ff9b::a00:1 reach 10.0.0.1 cannot be known here. Only the IPv4-mapped
/// form is judged by its content, as the operating system dials exactly that.
const SPECIAL_RANGES: &[SpecialRange] = &[
    v4([0, 0, 0, 0], 8, "this network, RFC 791 §3.2"),
    v4([10, 0, 0, 0], 8, "private, RFC 1918"),
    v4([100, 64, 0, 0], 10, "shared by carrier-grade NAT, RFC 6598"),
    v4([127, 0, 0, 0], 8, "loopback, RFC 1122 §3.2.1.3"),
    // Among them 169.254.169.254, where clouds serve credentials to whoever asks.
    v4([169, 254, 0, 0], 16, "link-local, RFC 3927"),
    v4([172, 16, 0, 0], 12, "private, RFC 1918"),
    v4([192, 0, 0, 0], 24, "IETF protocol assignments, RFC 6890 §2.1"),
    v4([192, 0, 2, 0], 24, "documentation, RFC 5737"),
    v4([192, 88, 99, 0], 24, "former 6to4 relays, RFC 7526"),
    v4([192, 168, 0, 0], 16, "private, RFC 1918"),
    v4([198, 18, 0, 0], 15, "benchmarking, RFC 2544"),
    v4([198, 51, 100, 0], 24, "documentation, RFC 5737"),
    v4([203, 0, 113, 0], 24, "documentation, RFC 5737"),
    v4([224, 0, 0, 0], 4, "multicast, RFC 5771"),
    v4([255, 255, 255, 255], 32, "broadcast, RFC 919"),
    v4([240, 0, 0, 0], 4, "reserved, RFC 1112 §4"),
    // In no registry: a public address that Azure routes to the virtual machine's own host.
    v4([168, 63, 129, 16], 32, "Azure platform service, no RFC"),
    SpecialRange {
        net: IpNet::new_assert(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 128),
        purpose: "unspecified, RFC 4291 §2.5.2",
    },
    SpecialRange {
        net: IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
        purpose: "loopback, RFC 4291 §2.5.3",
    },
    v6([0, 0, 0, 0], 96, "IPv4-compatible, RFC 4291 §2.5.5.1"),
    v6([0x64, 0xff9b, 0, 0], 96, "translated to IPv4, RFC 6052"),
    v6([0x64, 0xff9b, 1, 0], 48, "translated to IPv4 locally, RFC 8215"),
    v6([0x100, 0, 0, 0], 64, "discard-only, RFC 6666"),
    v6([0x100, 0, 0, 1], 64, "dummy prefix, RFC 9780"),
    v6([0x2001, 0, 0, 0], 32, "Teredo, RFC 4380"),
    v6([0x2001, 2, 0, 0], 48, "benchmarking, RFC 5180"),
    v6([0x2001, 0x10, 0, 0], 28, "former ORCHID, RFC 4843"),
    v6([0x2001, 0x20, 0, 0], 28, "ORCHIDv2, RFC 7343"),
    v6([0x2001, 0, 0, 0], 23, "IETF protocol assignments, RFC 2928"),
    v6([0x2001, 0xdb8, 0, 0], 32, "documentation, RFC 3849"),
    v6([0x2002, 0, 0, 0], 16, "6to4, RFC 3056"),
    v6([0x3fff, 0, 0, 0], 20, "documentation, RFC 9637"),
    v6([0x5f00, 0, 0, 0], 16, "segment routing, RFC 9602"),
    v6([0xfc00, 0, 0, 0], 7, "unique local, RFC 4193"),
    v6([0xfe80, 0, 0, 0], 10, "link-local, RFC 4291 §2.5.6"),
    v6([0xfec0, 0, 0, 0], 10, "former site-local, RFC 3879"),
    v6([0xff00, 0, 0, 0], 8, "multicast, RFC 4291 §2.7"),
    // The rest of what lies outside 2000::/3, the only global unicast space.
    v6([0, 0, 0, 0], 3, "reserved, RFC 4291 §2.4"),
    v6([0x4000, 0, 0, 0], 2, "reserved, RFC 4291 §2.4"),
    v6([0x8000, 0, 0, 0], 1, "reserved, RFC 4291 §2.4"),
];

/// Why a URL was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlRefused {
    /// Neither `http` nor `https`.
    #[error("the URL must start with http:// or https://")]
    Scheme,
    /// There is no host.
    #[error("the URL must name a host")]
    Host,
    /// A user name or password; they would end in logs. Credentials belong in a header.
    #[error("the URL must not contain a user name or password; send credentials in a header")]
    UserInfo,
    /// A fragment is never sent (RFC 9110 §4.2.5).
    #[error("the URL must not have a fragment (#…): it would not be sent")]
    Fragment,
    /// Port 0 cannot be connected to.
    #[error("the URL must not name port 0")]
    Port,
    /// Longer than [`MAX_URL_LEN`].
    #[error("the URL must have at most {MAX_URL_LEN} characters")]
    TooLong,
    /// It parses as a URL (WHATWG), but cannot be written in a request (RFC 9112 §3.2).
    #[error("the URL has characters that cannot be sent in a request; percent-encode them")]
    Target,
    /// The host is an address that is not public.
    #[error("the address {address} is not public ({range})")]
    Address {
        /// As it would be dialled.
        address: IpAddr,
        /// The special purpose of its range, with the source.
        range: &'static str,
    },
    /// `localhost`, or a name below it, which mean loopback (RFC 6761 §6.3).
    #[error("the host name localhost means loopback, which is not public")]
    Localhost,
}

/// Decides which addresses may be dialled.
#[derive(Debug, Clone, Default)]
pub struct AddressPolicy {
    allow: Arc<[IpNet]>,
}

impl AddressPolicy {
    /// Public addresses, and what lies in `allow` whatever it is. An IPv4-mapped address is judged as
    /// the IPv4 address inside, so it is allowed by an IPv4 network only.
    pub fn new(allow: Vec<IpNet>) -> Self {
        Self { allow: allow.into() }
    }

    /// Whether `address` may be dialled.
    pub fn permits(&self, address: IpAddr) -> bool {
        self.refusal(address).is_none()
    }

    /// Why `address` may not be dialled.
    fn refusal(&self, address: IpAddr) -> Option<&'static str> {
        let address = address.to_canonical();
        if self.allow.iter().any(|net| net.contains(&address)) {
            return None;
        }
        SPECIAL_RANGES.iter().find(|range| range.net.contains(&address)).map(|range| range.purpose)
    }

    /// Refuses a URL that could never be called, before anything is stored or dialled.
    ///
    /// # Errors
    /// The first rule that the URL breaks.
    pub fn check_url(&self, url: &Url) -> Result<(), UrlRefused> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(UrlRefused::Scheme);
        }
        let host = url.host().ok_or(UrlRefused::Host)?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UrlRefused::UserInfo);
        }
        if url.fragment().is_some() {
            return Err(UrlRefused::Fragment);
        }
        if url.port() == Some(0) {
            return Err(UrlRefused::Port);
        }
        // A parsed URL is ASCII: the host is in its xn-- form, the rest percent-encoded.
        if url.as_str().len() > MAX_URL_LEN {
            return Err(UrlRefused::TooLong);
        }
        if url.as_str().parse::<http::Uri>().is_err() {
            return Err(UrlRefused::Target);
        }
        match host {
            Host::Ipv4(address) => self.check_address(address.into()),
            Host::Ipv6(address) => self.check_address(address.into()),
            Host::Domain(name) if is_localhost(name) && !self.permits_loopback() => {
                Err(UrlRefused::Localhost)
            }
            Host::Domain(_) => Ok(()),
        }
    }

    fn check_address(&self, address: IpAddr) -> Result<(), UrlRefused> {
        match self.refusal(address) {
            Some(range) => Err(UrlRefused::Address { address: address.to_canonical(), range }),
            None => Ok(()),
        }
    }

    fn permits_loopback(&self) -> bool {
        self.permits(Ipv4Addr::LOCALHOST.into()) || self.permits(Ipv6Addr::LOCALHOST.into())
    }
}

/// `name` comes from a parsed URL, so it is in lower case.
fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
#[path = "address_tests.rs"]
mod tests;
