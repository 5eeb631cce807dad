//! The network devices of guests, as the manager attaches, lists and removes them.
#![forbid(unsafe_code)]

mod archive;
#[allow(dead_code, reason = "shared by tests")]
mod common;
#[allow(dead_code, reason = "shared by tests")]
mod world;

use serde_json::json;
use toolstack::DomainId;
use toolstack::manager::NetworkDevice;
use world::World;

const WEB: &str = "name = 'web'\nmemory = 16\nkernel = 'k'\n";
const DB: &str = "name = 'db'\nmemory = 16\nkernel = 'k'\n";
const SECOND: u64 = 1_000_000_000;
const CRASH: u32 = 3;
const REBOOT: u32 = 1;
const POWEROFF: u32 = 0;

const DISKS: &str = "disk = ['memory:1M,,xvda,w']\n";
const VIFS: &str = "vif = ['', 'bridge=lan,mac=00:16:3e:00:00:01,ip=10.0.0.9']\n";

/// A network device that goes slowly keeps the domain, and no disk.
#[test]
fn a_domain_stays_until_its_network_devices_are_gone() {
    for (disks, end) in [("", "crash"), (DISKS, "crash"), (DISKS, "destroy web")] {
        let mut world = World::running(&[&format!("{WEB}{VIFS}{disks}"), DB]);
        world.fake().networks.held.set(true);
        if end == "crash" {
            world.shut_down(7, CRASH);
        } else {
            world.begin_asking(end);
            world.settle();
        }
        world.pass(11 * SECOND);
        world.pass(2 * SECOND);
        assert!(world.fake().machine.borrow().domains.contains_key(&7), "{disks}{end}: its pages are still mapped");
        assert_eq!(world.text("block-list"), "no disks", "{end}");
        world.fake().networks.forget(DomainId(7));
        world.pass(SECOND);
        world.pass(SECOND);
        assert!(!world.fake().machine.borrow().domains.contains_key(&7), "{disks}{end}");
        world.shut_down(8, POWEROFF);
        assert_eq!((world.left(), world.manager.all_ended()), (vec![], true), "{disks}{end}");
    }
}

/// A guest with two network devices is made, and loses them when it ends, however it ends.
#[test]
fn a_guest_gets_its_devices_and_leaves_none() {
    for end in ["crash", "destroy web", "reboot"] {
        let mut world = World::running(&[&format!("{WEB}{VIFS}")]);
        let own = network::Mac::of_guest("web", 0).to_string();
        let listed = world.json("network-list web");
        let (first, second) = (&listed[0], &listed[1]);
        assert_eq!(
            (first["mac"].as_str(), first["network"].as_str(), first["device"].as_u64()),
            (Some(&*own), Some("nat"), Some(0))
        );
        assert_eq!((&first["flows"], &second["flows"]), (&json!(7), &json!(null)), "only nat translates");
        let drops = json!({"spoofed": 5, "rate": 6});
        let expected = json!({
            "name": "web", "domid": 7, "device": 1, "mac": "00:16:3e:00:00:01", "network": "lan", "ip": "10.0.0.9",
            "state": "connected", "received": 1, "received_bytes": 2048, "sent": 3, "sent_bytes": 4096, "drops": drops
        });
        assert_eq!(*second, expected);
        let text = world.text("network-list");
        let line = "web                    1 00:16:3e:00:00:01 lan             10.0.0.9        connected         1         2         3         4      11";
        assert_eq!(text.lines().nth(2), Some(line), "{text}");
        match end {
            "crash" => world.shut_down(7, CRASH),
            "reboot" => {
                world.shut_down(7, REBOOT);
                world.pass(SECOND);
                assert_eq!(world.json("network-list")[0]["domid"], 8, "the guest has its devices again");
                assert_eq!(world.json("network-list")[0]["mac"], *own, "with the same address");
                world.shut_down(8, POWEROFF);
            }
            verb => assert_eq!(world.text(verb), ""),
        }
        assert_eq!((world.left(), world.text("network-list")), (vec![], "no network devices".into()), "{end}");
        assert_eq!(world.text("network-list web"), "guest web has ended");
    }
}

#[test]
fn a_guest_whose_device_cannot_be_attached_is_not_made() {
    let mut world = World::planned(&[&format!("{WEB}disk = ['memory:1M,,xvda']\n{VIFS}"), DB]);
    world.fake().networks.broken.replace("lan".into());
    world.begin();
    world.settle();
    assert_eq!(world.told()[0], "error: guest web: vif 1: there is no such network");
    assert_eq!(world.text("network-list"), "no network devices");
    assert_eq!(world.text("domid db"), "8");
    assert_eq!(world.text("destroy db"), "");
    assert_eq!(world.left(), Vec::<String>::new());
}

#[test]
fn devices_come_and_go_while_a_guest_runs() {
    let mut world = World::running(&[WEB, DB]);
    assert_eq!((world.text("network-list"), world.json("network-list web")), ("no network devices".into(), json!([])));
    assert_eq!(world.json("network-attach web"), json!({"done": "network-attach", "name": "web"}));
    assert_eq!(world.text("network-attach web bridge=lan"), "");
    assert_eq!(
        world.json("networks")[0],
        json!({"network": "nat", "kind": "translated", "vifs": 2, "address": "10.77.0.1/24", "uplink": null})
    );
    let networks = "network         kind         vifs dom0's address     uplink\nnat             translated      2 10.77.0.1/24       -";
    assert_eq!(world.text("networks"), networks);
    let drops = vec![("oversize", 9), ("flood", 1)];
    let (received, received_bytes, sent, sent_bytes, resets) = (1, 2_048, 3, 4_096, 2);
    let device = NetworkDevice { link: true, received, received_bytes, sent, sent_bytes, resets, drops };
    world.fake().networks.device.replace(Some(device));
    let line = "uplink          bridged         0 -                  eth0, link up, received 1 (2 KiB), sent 3 (4 KiB), dropped 10, resets 2";
    assert_eq!(world.text("networks"), format!("{networks}\n{line}"));
    assert_eq!(
        world.json("networks")[1]["device"],
        json!({
            "link": "up", "received": 1, "received_bytes": 2_048, "sent": 3, "sent_bytes": 4_096, "resets": 2,
            "drops": {"oversize": 9, "flood": 1}
        })
    );
    world.fake().networks.device.replace(None);
    assert_eq!(world.text("network-detach web 7"), "guest web: it has no network device 7");
    world.fake().networks.busy.set(true);
    assert_eq!(world.text("network-detach web 0"), "guest web: it is used");
    assert_eq!(world.json("network-detach web 0 --force"), json!({"done": "network-detach", "name": "web"}));
    world.fake().networks.busy.set(false);
    // The lowest number that is free comes first.
    assert_eq!(world.text("network-attach web mac=00:16:3e:00:00:02"), "");
    let numbers: Vec<u64> =
        world.json("network-list web").as_array().unwrap().iter().map(|row| row["device"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [0, 1]);
    assert_eq!(world.text("network-detach web 00:16:3E:00:00:02"), "");
    for _ in 1..8 {
        assert_eq!(world.text("network-attach web"), "");
    }
    assert_eq!(world.text("network-attach web"), "guest web: vif 8: a guest has at most 8 network devices");
    assert_eq!(world.text("network-attach none"), "there is no guest none");
    world.shut_down(7, POWEROFF);
    assert_eq!(world.text("network-attach web"), "guest web has ended");
    assert_eq!(world.text("network-list"), "no network devices");
}
