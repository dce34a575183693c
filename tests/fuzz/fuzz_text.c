/* SPDX-License-Identifier: Apache-2.0
 *
 * Text to addresses, prefixes and MACs: nothing is read beyond the text, what is
 * accepted reads the same in its canonical form, and a prefix has no host bits.
 */
#include "claim.h"
#include "fuzz.h"

#include <arpa/inet.h>

static void check_prefix(uint8_t family, const struct fdp_prefix *prefix)
{
    const unsigned width = family == AF_INET6 ? 128 : 32;
    struct fdp_prefix again;
    char text[INET6_ADDRSTRLEN + 4];

    CHECK(prefix->length <= width);
    for (unsigned bit = prefix->length; bit < 128; bit++)
        CHECK(!(prefix->address[bit / 8] >> (7 - bit % 8) & 1));
    CHECK(inet_ntop(family, prefix->address, text, INET6_ADDRSTRLEN));
    size_t used = strlen(text);
    used += (size_t)snprintf(text + used, sizeof text - used, "/%u", prefix->length);
    CHECK(fdp_parse_prefix(family, text, used, &again) == 0);
    CHECK(memcmp(&again, prefix, sizeof again) == 0);
    CHECK(fdp_prefix_holds(prefix->address, prefix->length, again.address));
    CHECK(fdp_prefix_overlaps(prefix->address, prefix->length, again.address, 128));
}

static void check_address(uint8_t family, const uint8_t address[16])
{
    uint8_t again[16];
    char text[INET6_ADDRSTRLEN];

    CHECK(inet_ntop(family, address, text, sizeof text));
    CHECK(fdp_parse_address(family, text, strlen(text), again) == 0);
    CHECK(memcmp(again, address, sizeof again) == 0);
}

static void check_mac(const uint8_t mac[6])
{
    uint8_t again[6];
    char text[18];

    snprintf(text, sizeof text, "%02X-%02X-%02X-%02X-%02X-%02X", mac[0], mac[1], mac[2], mac[3],
             mac[4], mac[5]);
    CHECK(fdp_parse_mac(text, 17, again) == 0);
    CHECK(memcmp(again, mac, sizeof again) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t families[] = {AF_INET, AF_INET6};
    const char *text = (const char *)data;
    struct fdp_prefix prefix;
    uint8_t address[16], mac[6];

    for (size_t i = 0; i < sizeof families; i++) {
        if (fdp_parse_address(families[i], text, size, address) == 0)
            check_address(families[i], address);
        if (fdp_parse_prefix(families[i], text, size, &prefix) == 0)
            check_prefix(families[i], &prefix);
    }
    if (fdp_parse_mac(text, size, mac) == 0)
        check_mac(mac);
    return 0;
}
