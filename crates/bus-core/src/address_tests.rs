#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn allowing(nets: &[&str]) -> AddressPolicy {
    AddressPolicy::new(nets.iter().map(|net| net.parse().unwrap()).collect())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn check(policy: &AddressPolicy, url: &str) -> Result<(), UrlRefused> {
    policy.check_url(&Url::parse(url).unwrap())
}

#[test]
fn public_addresses_are_permitted() {
    let policy = AddressPolicy::default();
    for public in [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2000::",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2003::1",
        "2606:4700:4700::1111",
        "3ffe:ffff::",
        "3fff:1000::",
    ] {
        assert!(policy.permits(ip(public)), "{public}");
    }
}

#[test]
fn special_ranges_are_refused_from_first_to_last_address() {
    let policy = AddressPolicy::default();
    for range in SPECIAL_RANGES {
        // Written with host bits, a line would still be matched but no longer read as the registry does.
        assert_eq!(range.net, range.net.trunc(), "{}", range.purpose);
        for address in [range.net.network(), range.net.broadcast()] {
            assert!(!policy.permits(address), "{address} ({})", range.purpose);
        }
    }
}

#[test]
fn each_refusal_gives_the_precise_range() {
    let policy = AddressPolicy::default();
    for (address, purpose) in [
        ("0.0.0.0", "this network"),
        ("10.1.2.3", "private"),
        ("100.100.100.200", "carrier-grade"),
        ("127.0.0.53", "loopback"),
        ("169.254.169.254", "link-local"),
        ("172.31.255.255", "private"),
        ("192.0.0.192", "IETF protocol"),
        ("192.168.1.1", "private"),
        ("198.19.255.255", "benchmarking"),
        ("203.0.113.9", "documentation"),
        ("239.255.255.250", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("250.0.0.1", "reserved"),
        ("168.63.129.16", "Azure"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::7f00:1", "IPv4-compatible"),
        ("::ffff:127.0.0.1", "loopback, RFC 1122"),
        ("::ffff:0:7f00:1", "reserved"),
        ("64:ff9b::7f00:1", "translated to IPv4, RFC 6052"),
        ("64:ff9b::808:808", "translated to IPv4, RFC 6052"),
        ("64:ff9b:1::1", "translated to IPv4 locally"),
        ("100::1", "discard-only"),
        ("100:0:0:1::1", "dummy"),
        ("2001::1", "Teredo"),
        ("2001:2::1", "benchmarking"),
        ("2001:1::1", "IETF protocol"),
        ("2001:db8::1", "documentation"),
        ("2002:7f00:1::", "6to4"),
        ("3fff::1", "documentation"),
        ("5f00::1", "segment routing"),
        ("fd00:ec2::254", "unique local"),
        ("fe80::1", "link-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("4000::1", "reserved"),
        ("c000::1", "reserved"),
    ] {
        let refusal = policy.refusal(ip(address)).unwrap_or_else(|| panic!("{address} is permitted"));
        assert!(refusal.contains(purpose), "{address}: {refusal}");
    }
}

#[test]
fn an_allowed_network_is_permitted_and_nothing_beside_it() {
    let policy = allowing(&["127.0.0.0/8", "fd00:1::/32"]);
    for permitted in ["127.0.0.1", "127.9.9.9", "::ffff:127.0.0.1", "fd00:1::5", "1.1.1.1"] {
        assert!(policy.permits(ip(permitted)), "{permitted}");
    }
    for refused in ["10.0.0.1", "::1", "fd00:2::5", "::7f00:1", "64:ff9b::7f00:1"] {
        assert!(!policy.permits(ip(refused)), "{refused}");
    }
}

#[test]
fn an_ipv6_network_allows_no_ipv4_address() {
    let policy = allowing(&["::/0"]);
    assert!(policy.permits(ip("::1")));
    assert!(!policy.permits(ip("127.0.0.1")));
    assert!(!policy.permits(ip("::ffff:127.0.0.1")));
}

#[test]
fn ordinary_urls_pass() {
    let policy = AddressPolicy::default();
    for url in [
        "https://example.com",
        "http://example.com:8080/hook?token=a%20b&x=[]|",
        "https://xn--bcher-kva.example/",
        "https://bücher.example/ä",
        "https://1.1.1.1/hook",
        "https://[2606:4700:4700::1111]:8443/",
        "https://localhost.example.com/",
        "https://notlocalhost/",
    ] {
        assert_eq!(check(&policy, url), Ok(()), "{url}");
    }
}

#[test]
fn urls_that_cannot_be_called_are_refused() {
    let policy = AddressPolicy::default();
    for (url, refused) in [
        ("ftp://example.com/", UrlRefused::Scheme),
        ("file:///etc/passwd", UrlRefused::Scheme),
        ("unix:/run/docker.sock", UrlRefused::Scheme),
        ("https://user@example.com/", UrlRefused::UserInfo),
        ("https://:secret@example.com/", UrlRefused::UserInfo),
        ("https://example.com/#top", UrlRefused::Fragment),
        ("https://example.com/#", UrlRefused::Fragment),
        ("https://example.com:0/", UrlRefused::Port),
        ("http://localhost/", UrlRefused::Localhost),
        ("http://LOCALHOST.:80/", UrlRefused::Localhost),
        ("http://a.b.localhost/", UrlRefused::Localhost),
    ] {
        assert_eq!(check(&policy, url), Err(refused), "{url}");
    }
}

#[test]
fn the_length_limit_is_exact() {
    let policy = AddressPolicy::default();
    let prefix = "https://example.com/";
    let longest = format!("{prefix}{}", "a".repeat(MAX_URL_LEN - prefix.len()));
    assert_eq!(check(&policy, &longest), Ok(()));
    assert_eq!(check(&policy, &format!("{longest}a")), Err(UrlRefused::TooLong));
}

/// `inet_aton` spellings and full-width digits: the URL parser makes ordinary addresses of them
/// (WHATWG URL, "IPv4 parser"), so that none slips through as a host name.
#[test]
fn every_spelling_of_a_private_address_is_refused() {
    let policy = AddressPolicy::default();
    for url in [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://127.0.0.1:80/",
        "http://%31%32%37.0.0.1/",
        "http://127。0。0。1/",
        "http://１２７.0.0.1/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[0:0:0:0:0:ffff:7f00:0001]/",
    ] {
        let expected =
            Err(UrlRefused::Address { address: ip("127.0.0.1"), range: "loopback, RFC 1122 §3.2.1.3" });
        assert_eq!(check(&policy, url), expected, "{url}");
        assert_eq!(check(&allowing(&["127.0.0.0/8"]), url), Ok(()), "{url}");
    }
    for url in [
        "http://0/",
        "http://0.0.0.0/",
        "http://[::]/",
        "http://[::1]/",
        "http://[fe80::1]/",
        "http://2852039166/",
    ] {
        assert!(matches!(check(&policy, url), Err(UrlRefused::Address { .. })), "{url}");
    }
}

#[test]
fn localhost_passes_when_either_loopback_is_allowed() {
    for net in ["127.0.0.0/8", "::1/128"] {
        assert_eq!(check(&allowing(&[net]), "http://localhost:8080/"), Ok(()), "{net}");
    }
    assert_eq!(check(&allowing(&["10.0.0.0/8"]), "http://localhost/"), Err(UrlRefused::Localhost));
}

#[test]
fn refusals_say_what_to_change() {
    let refused = check(&AddressPolicy::default(), "http://10.0.0.1/").unwrap_err();
    assert_eq!(refused.to_string(), "the address 10.0.0.1 is not public (private, RFC 1918)");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn a_mapped_address_is_judged_as_its_ipv4_address(
        bits: u32,
        net: u32,
        prefix_len in 0u8..=32,
        allow_v6: bool,
    ) {
        let mut allow = vec![IpNet::new_assert(Ipv4Addr::from(net).into(), prefix_len)];
        if allow_v6 {
            allow.push("::/0".parse().unwrap());
        }
        let plain = Ipv4Addr::from(bits);
        let mapped = IpAddr::V6(plain.to_ipv6_mapped());
        for policy in [AddressPolicy::default(), AddressPolicy::new(allow)] {
            prop_assert_eq!(policy.permits(plain.into()), policy.permits(mapped));
            let url = |host: String| Url::parse(&format!("http://{host}/")).unwrap();
            let verdict = policy.check_url(&url(plain.to_string()));
            prop_assert_eq!(&verdict, &policy.check_url(&url(format!("[{mapped}]"))));
            prop_assert_eq!(&verdict, &policy.check_url(&url(bits.to_string())));
            prop_assert_eq!(&verdict, &policy.check_url(&url(format!("{bits:#x}"))));
        }
    }

    /// What the standard library knows to be special is never permitted.
    #[test]
    fn the_table_covers_what_the_standard_library_knows(bits: u32, wide: u128) {
        let policy = AddressPolicy::default();
        let v4 = Ipv4Addr::from(bits);
        let special = v4.is_private()
            || v4.is_loopback()
            || v4.is_link_local()
            || v4.is_multicast()
            || v4.is_broadcast()
            || v4.is_documentation()
            || v4.is_unspecified();
        prop_assert!(!(special && policy.permits(v4.into())), "{}", v4);
        let v6 = Ipv6Addr::from(wide);
        let global_unicast = v6.segments()[0] >> 13 == 1;
        prop_assert!(global_unicast || !policy.permits(v6.into()) || v6.to_ipv4_mapped().is_some(), "{}", v6);
    }
}
